"""Pipeline schedules as tables: built, checked, simulated and drawn."""
