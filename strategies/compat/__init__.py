"""The one door to the private names of torch, DeepSpeed and Python: nothing outside this package reaches for them."""
