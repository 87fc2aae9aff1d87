"""The processes of a run: joining, stopping, memory, compiled programs."""
