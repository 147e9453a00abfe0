"""Engine families behind one pair of protocols."""
