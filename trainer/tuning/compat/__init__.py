"""The names of peft and transformers that adapters need and that no public interface of these libraries gives."""
