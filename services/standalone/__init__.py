"""Everything in one process: the five services on one gRPC server and one Unix socket, over one data directory.

There is no code path of its own: peers are addresses here too, so the stubs, interceptors, deadlines and errors are
those of five processes.

- `settings.py`: one data directory expands into the settings of the five services
- `lock.py`: one process a data directory
- `reserve.py`: room for a start on a full disk
- `app.py`: opens the five and serves them; says where they are once they are ready
"""
