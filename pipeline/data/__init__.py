"""Images, label maps, splits and the one preprocessing spec."""
