"""A server's watches without its question worker, which is replaced by reports."""

from flash_vstream.live.messages import Alert, Report
from flash_vstream.live.watch_rules import WatchState
from flash_vstream.serve.alert_store import AlertStore
from flash_vstream.serve.schemas import NewWatch
from flash_vstream.serve.security import AccessRules
from flash_vstream.serve.watches import Watches


class Client:
    """Stands in for the question client: keeps what it is told."""

    def __init__(self):
        self.watches = {}

    def set_watch(self, watch):
        self.watches[watch.id] = watch

    def drop_watch(self, watch):
        self.watches.pop(watch, None)


class Server:
    """The watches of one server over a folder; more than one may be opened, as after a kill."""

    def __init__(self, folder, access=None, streams=("door", "yard")):
        self.client, self.places = Client(), {"door": ("/state/1", 1.0), "yard": ("/state/2", 0.1)}
        self.store = AlertStore(folder)
        self.live, self.recorded = {"door"}, set()
        self.watches = Watches(
            self.store,
            self.client,
            access or AccessRules(),
            self.places.get,
            self.live.__contains__,
            self.recorded.__contains__,
            streams,
        )

    def add(self, stream="door", watch="dog", **fields):
        new = NewWatch(event="a dog", id=watch, **fields)
        return self.watches.add(stream, new.model_dump(exclude={"id"}), watch)

    def report(self, watch="dog", kind="start", time=7.0, phase="there"):
        state = WatchState(phase, time, 0.9, looks=8, events=1).to_dict()
        alert = Alert(kind, 5.0, time, 1.7e9, 0.9, 0.8, "A dog runs.", (6.0, 7.0), b"jpeg")
        self.watches.take(Report(watch, state, alert))
