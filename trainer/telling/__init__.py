"""What a run says: at its start and end, meanwhile, in its record, and in the run table of a tracker."""
