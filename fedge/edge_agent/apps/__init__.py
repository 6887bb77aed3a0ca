"""The local service: what apps on this device ask of its agent, over HTTP/1.1.

On a Unix socket, which belongs to one user, and on 127.0.0.1 with a token, if switched on. Apps
give texts to learn from, take them back, and ask the version in use; nothing here sends anything
off the device. Off unless `[apps]` in agent.toml says where to listen.

    settings      where, and how much
    listening     sockets, and who may be at the other end; `bearer`: the token
    connection    bytes ↔ requests, within bounds of size and time (h11 does the syntax)
    admission     a request's head → the operation that it names, or a refusal
    contract      what requests and answers hold: these models parse, answer and describe
    operations    what is done
    openapi       the description, made from the contract

What comes from an app is hostile until it is parsed: any program of the user may connect.
"""
