"""What the report's page shows, computed from the stages' reports: answers, the network as a U, plots, pictures."""
