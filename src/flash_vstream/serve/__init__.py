"""The HTTP server over live streams: REST, server-sent events, OpenAI's endpoints and the web page."""
