"""The networks that get compiled: plain torch."""
