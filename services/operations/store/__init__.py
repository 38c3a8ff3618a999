"""Rows of every service, as an operator handles them.

- `services.py`: which tables a service has
- `moments.py`: reading several databases as they are at one moment
- `moving.py`: rows out of tables and into them
"""
