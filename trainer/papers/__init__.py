"""What goes with a model: papers written from what its run recorded. What nobody answered stands as open."""
