"""What a run will take, found by simulating it before there is one."""
