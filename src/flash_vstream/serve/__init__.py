"""HTTP on top of live streams: REST, server-sent events, OpenAI's chat endpoint, the web page."""
