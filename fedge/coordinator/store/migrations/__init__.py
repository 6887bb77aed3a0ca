"""The steps from each schema of the coordinator's database to the next, for Alembic.

Files in `versions/` are numbered, run in order and are never changed once released.
"""
