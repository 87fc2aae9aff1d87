"""What a run reports: metrics, model FLOPs, heartbeat, traces."""
