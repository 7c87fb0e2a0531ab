"""Who reflects: functions from conversations to replies."""
