"""The processes of one job: joining, agreeing, who may write, and when to stop."""
