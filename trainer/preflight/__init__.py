"""Whether the nodes of a job can run it: what each of them sees, how they exchange, and which of them is the odd one."""
