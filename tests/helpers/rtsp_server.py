"""A real RTSP server (GStreamer's), run by the system Python: ``rtsp_server.py PORT [WIDTH HEIGHT [LOSS]]``.

``LOSS`` is the share of RTP packets that the server drops, 0 to 1.
"""

import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

port, width, height, loss = (*sys.argv[1:], *("", "320", "240", "0")[len(sys.argv) - 1 :])
Gst.init(None)
server = GstRtspServer.RTSPServer()
server.set_service(port)
factory = GstRtspServer.RTSPMediaFactory()
factory.set_launch(
    "( videotestsrc is-live=true pattern=ball !"
    f" video/x-raw,format=I420,width={width},height={height},framerate=15/1 ! jpegenc ! rtpjpegpay pt=26 !"
    f" identity name=pay0 drop-probability={loss} )"
)
factory.set_shared(True)
server.get_mount_points().add_factory("/camera", factory)
server.attach(None)
print("serving", flush=True)
GLib.MainLoop().run()
