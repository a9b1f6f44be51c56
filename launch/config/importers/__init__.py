"""Files of other trainers (axolotl, LLaMA-Factory, TRL, accelerate, DeepSpeed) in our settings. Needs no torch."""
