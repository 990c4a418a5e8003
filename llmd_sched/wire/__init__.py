"""The messages Envoy and the scheduler exchange, as generated protobuf modules. Do not edit them.

    ext_proc_pb2          the ext_proc conversation (both data paths)
    processing_mode_pb2   which parts of an exchange Envoy sends
    als_pb2               the gRPC access log service (lean path)
    accesslog_pb2         one finished request in that log
    core_pb2              headers, metadata, addresses
    http_status_pb2       HTTP status codes

They are made from ``proto/llmd_sched/wire/*.proto`` by ``make proto``. Those files are our own and hold only what the
scheduler reads or writes, or somebody debugging it wants to see; names, numbers and types are Envoy's, so the bytes are
too. There are no generated gRPC stubs: the server registers generic handlers by method name.

The full message names are Envoy's own, so a process that imports this package cannot also import another package
that defines them (``xds-protos``).
"""
