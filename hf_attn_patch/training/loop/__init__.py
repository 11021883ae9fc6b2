"""What stands around the steps: schedule, checkpoints, logs, the folder that is written."""
