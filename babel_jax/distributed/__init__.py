"""The processes of one job: joining, agreement, write access, and stops."""
