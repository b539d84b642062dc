"""What a team is told: the automations of a real server call a webhook on this machine."""

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.system import Secret
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events import emit_event
from prefect.events.schemas.automations import AutomationCore
from prefect.states import Running

from deployments import automations
from tasks import show
from tinycats_core.errors import ReleaseRejected, TinycatsError

NAMES = ["no heartbeat", "release rejected", "nightly regressed", "approval waiting", "run failed"]
WAIT_SECONDS = 30.0


@pytest.fixture
def client(prefect_server: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as found:
        yield found
        for one in found.read_automations():
            found.delete_automation(one.id)


@pytest.fixture
def told(client: SyncPrefectClient) -> Iterator[list[dict[str, str]]]:
    """What a webhook on this machine has received; the block `custom-webhook/cats` calls it."""
    received: list[dict[str, str]] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["content-length"]))) | {"by": self.headers["x-token"]})
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Webhook) as there:
        Thread(target=there.serve_forever, daemon=True).start()
        block = CustomWebhookNotificationBlock(
            name="cats",
            url=f"http://127.0.0.1:{there.server_port}",
            json_data={"subject": "{{subject}}", "body": "{{body}}"},
            headers={"x-token": "{{token}}"},
            cookies=None,
            secrets={"token": "s3cret"},  # pyright: ignore[reportArgumentType]
        )
        block.save("cats", overwrite=True)
        yield received
        there.shutdown()


def state(client: SyncPrefectClient) -> dict[str, dict[str, Any]]:
    return {one.name.removeprefix("tinycats: "): one.model_dump(mode="json") for one in client.read_automations()}


def test_a_second_time_changes_nothing_and_what_a_team_has_set_stays(
    client: SyncPrefectClient, told: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
):
    assert automations.main([]) == 0
    assert [*state(client)] == NAMES[:1]
    assert automations.main(["--notify", "custom-webhook/cats"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "kept: tinycats: no heartbeat",
        *(f"created: tinycats: {n}" for n in NAMES[1:]),
    ]
    (theirs,) = client.read_automations_by_name("tinycats: run failed")
    theirs = theirs.model_copy(update={"description": "ours", "enabled": False})
    client.update_automation(theirs.id, AutomationCore(**theirs.model_dump(exclude={"id", "owner_resource"})))
    before = state(client)
    assert before.keys() == {*NAMES}
    assert "s3cret" not in json.dumps(before)
    automations.bring(client, "custom-webhook/cats")
    assert state(client) == before

    other = CustomWebhookNotificationBlock(name="dogs", url="http://127.0.0.1:9", headers=None, cookies=None).save(
        "dogs", overwrite=True
    )
    assert automations.bring(client, "custom-webhook/dogs")[-1] == "now notifies custom-webhook/dogs: tinycats: run failed"
    now = state(client)
    assert (now["run failed"]["description"], now["run failed"]["enabled"]) == ("ours", False)
    assert {UUID(one["actions"][0]["block_document_id"]) for name, one in now.items() if name != "no heartbeat"} == {other}


@pytest.mark.parametrize("name", ["cats", "/cats", "slack-webhook/none", "secret/word"])
def test_a_block_that_cannot_notify_is_one_line_and_creates_nothing(name: str, client: SyncPrefectClient):
    Secret(value="word").save("word", overwrite=True)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TinycatsError, match=f"--notify is '?{name}"):
        automations.bring(client, name)
    assert state(client) == {}


def hear(told: list[dict[str, str]], count: int) -> dict[str, str]:
    """Wait until a webhook has received so many notifications. Returns them, the text of each by its subject."""
    deadline = time.monotonic() + WAIT_SECONDS
    while len(told) < count and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)  # for one that should not come
    assert {item["by"] for item in told} == {"s3cret"}
    heard = {item["subject"]: item["body"] for item in told}
    assert len(told) == len(heard) == count
    return heard


def test_a_team_is_told_once_of_each_thing_that_needs_a_person(client: SyncPrefectClient, told: list[dict[str, str]]):
    automations.bring(client, "custom-webhook/cats")

    @flow(name="nightly-eval")
    def happens(event: str) -> None:
        if event == "broken":
            raise OSError("no space left")
        facts = {"kid_breed": "0.1 > 0.05"} if event != "waiting" else {"version": "abc", "days": 7}
        show.event(f"tinycats.release.{event}", "tinycats.release.my.cats", facts)
        if event != "waiting":
            raise ReleaseRejected("the gate refused it")

    for event in ("rejected", "regressed", "waiting", "broken"):
        happens(event, return_state=True)
    heard = hear(told, 4)
    (failed,) = [subject for subject in heard if subject.startswith("nightly-eval ")]
    assert failed.endswith(" is Failed")
    assert heard == {
        "my.cats: the gate refused a release": "- kid_breed: 0.1 > 0.05\n",
        "my.cats is worse than it says": "- kid_breed: 0.1 > 0.05\n",
        "my.cats abc waits for approval": "Resume or refuse it within 7 days.",
        failed: "Flow run encountered an exception: OSError: no space left",
    }


def test_a_run_whose_heartbeats_have_stopped_is_crashed_and_another_one_is_not(
    client: SyncPrefectClient, told: list[dict[str, str]]
):
    automations.bring(client, "custom-webhook/cats")

    @flow(name="evaluate-model")
    def gone() -> None:
        """Run on a machine that stops."""

    now = datetime.now(UTC)
    runs = {ago: client.create_flow_run(gone, state=Running()) for ago in (automations.SILENT * 1.1, automations.SILENT / 2)}
    deadline = time.monotonic() + WAIT_SECONDS
    while not told and time.monotonic() < deadline:  # again: the server takes no notice of events before it knows the automation
        for ago, run in runs.items():
            related = {
                "prefect.resource.role": "flow",
                "prefect.resource.id": f"prefect.flow.{run.flow_id}",
                "prefect.resource.name": "evaluate-model",
            }
            emit_event(automations.HEARTBEAT, {"prefect.resource.id": f"prefect.flow-run.{run.id}"}, now - ago, [related])
        emit_event("tinycats.now", {"prefect.resource.id": "tinycats.clock"})  # the server's clock is that of the last event
        time.sleep(1)
    heard = hear(told, 1)
    crashed, alive = (client.read_flow_run(run.id) for run in runs.values())
    assert (crashed.state_name, alive.state_name) == ("Crashed", "Running")
    assert heard == {f"evaluate-model {crashed.name} is Crashed": str(crashed.state and crashed.state.message)}
