"""The chat page, at `/` of the server: a client of the server's own HTTP API, and nothing more.

    app = create_app(service)
    with_page(app)                   # loramix.studio.site; needs the extra `studio`

Whatever a page does is a request that runs through the whole app (`client.py`), with the address
and the key of the browser that opened it, so it has the rights, limits, counters and log lines that
request would have from anywhere else.
"""
