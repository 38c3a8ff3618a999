"""What an operator does to an installation as a whole: backup, restore, checks, rotation of keys.

It works on the databases and the blobs themselves, by the settings of the services, so that it works whether they run
or not; what runs is not disturbed. `ekiben admin …` starts it as a process of its own.

- `installation.py`: where everything of an installation is
- `snapshots.py`: the form of a backup; pure
- `vaults/`: where backups lie: a folder or a bucket
- `store/`: rows of every service, out of and into databases, and the questions that checks ask of them
- `rows.py`, `copies.py`: rows and bytes on their way to a vault and back
- `backup.py`, `restore.py`, `fsck.py`: the operations; `findings.py` is what a check says
"""
