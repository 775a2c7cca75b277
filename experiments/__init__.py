"""SimCLR, the experiment that shows cosloss at work."""
