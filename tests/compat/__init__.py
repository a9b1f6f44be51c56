"""Each name of a library that no public interface gives, called as the product calls it."""
