"""The automations of a Prefect server: a run without a heartbeat is marked Crashed, and a team is told what needs a person.

One that is there stays as it is: paused, described or changed by a team. Only its notification block is replaced, if another
one is named. To get one of them anew, delete it and run this again.

python -m deployments.automations --notify slack-webhook/cats
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import BlockDocument, StateType
from prefect.events.actions import ActionTypes, ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import Automation, AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings

from deployments.serve import server_url
from flows.server import check_server
from tinycats_core.errors import TinycatsError, report_error

SILENT = timedelta(minutes=5)  # ten heartbeats; a server may be away for as long without a run being marked
FLOWS = ("release-model", "nightly-eval", "evaluate-model", "train-classifier")
FINAL = {f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Crashed", "Cancelled")}
HEARTBEAT = "prefect.flow-run.heartbeat"
REFUSED = "Flow run encountered an exception: ReleaseRejected*"  # a refusal has an automation of its own
PAGE = "{% set page = flow_run|ui_url if flow_run else None %}{% if page %}\n{{ page }}{% endif %}"
REASONS = "{% for term, why in event.payload.items() %}- {{ term }}: {{ why }}\n{% endfor %}"
NAME = "{{ event.resource['prefect.resource.id'].split('.', 2)[2] }}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Bring the automations to the server that PREFECT_API_URL names. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="tinycats automations", description=__doc__)
    parser.add_argument("--notify", metavar="TYPE/NAME", help="the Prefect block that notifies, such as slack-webhook/cats")
    given = parser.parse_args(arguments)
    try:
        url = server_url(str(PREFECT_API_URL.value() or ""))
        check_server(url)
        with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
            for line in bring(client, given.notify):
                print(line)
    except TinycatsError as error:
        return report_error(error)
    return 0


def bring(client: SyncPrefectClient, notify: str | None = None) -> list[str]:
    """Create the automations that are missing, and let the others notify a block if one is named. Returns a line for each.

    Raises:
        TinycatsError: there is no such block, or it cannot notify.
    """
    block = find_block(client, notify) if notify else None
    lines: list[str] = []
    for automation in [crash_detection(), *(notifications(block) if block else ())]:
        there = client.read_automations_by_name(automation.name)
        if not there:
            client.create_automation(automation)
            lines.append(f"created: {automation.name}")
        for one in there:
            changed = notifying(one, block) if block else None
            if changed:
                client.update_automation(one.id, changed)
            lines.append(f"now notifies {notify}: {one.name}" if changed else f"kept: {one.name}")
    return lines


def find_block(client: SyncPrefectClient, name: str) -> BlockDocument:
    """Return a notification block by the slug of its type and its name. Raises TinycatsError."""
    kind, slash, own = name.partition("/")
    if not (kind and slash and own):
        raise TinycatsError(f"--notify is {name!r}; write it as TYPE/NAME, such as slack-webhook/cats")
    try:
        document = client.read_block_document_by_name(own, kind, include_secrets=False)
    except ObjectNotFound:
        there = [f"{item.block_type.slug}/{item.name}" for item in client.read_block_documents() if item.block_type and _can(item)]
        known = f"; there are: {', '.join(sorted(there))}" if there else ""
        raise TinycatsError(f"--notify is {name}, but the server has no such block{known}. Create it on its page Blocks.") from None
    if not _can(document):
        raise TinycatsError(f"--notify is {name}, a block that cannot notify; give one such as custom-webhook/cats")
    return document


def crash_detection() -> AutomationCore:
    """Return the automation that marks a run Crashed once its heartbeats have stopped."""
    return AutomationCore(
        name="tinycats: no heartbeat",
        description="The process, its worker or its machine is gone. Run it again: it resumes.",
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=_of_our_flows(),
            for_each={"prefect.resource.id"},
            after={HEARTBEAT},
            expect={HEARTBEAT, *FINAL},
            posture=Posture.Proactive,
            within=SILENT,
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                state=StateType.CRASHED,
                force=False,
                message=f"No heartbeat for {SILENT.seconds // 60} minutes: its process, worker or machine is gone. Run it again.",
            )
        ],
    )


def notifications(block: BlockDocument) -> list[AutomationCore]:
    """Return the automations that tell a team what needs a person."""
    told = {
        "release rejected": ("tinycats.release.rejected", f"{NAME}: the gate refused a release", REASONS),
        "nightly regressed": ("tinycats.release.regressed", f"{NAME} is worse than it says", REASONS),
        "approval waiting": (
            "tinycats.release.waiting",
            f"{NAME} {{{{ event.payload.version }}}} waits for approval",
            "Resume or refuse it within {{ event.payload.days }} days.",
        ),
    }
    made = [
        _automation(name, EventTrigger(expect={event}), _tell(block, subject, body))
        for name, (event, subject, body) in told.items()
    ]
    failed = EventTrigger(
        match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*", "prefect.state-message": f"!{REFUSED}"}),
        match_related=_of_our_flows(),
        expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
    )
    what = "{{ flow.name }} {{ flow_run.name }} is {{ flow_run.state.name }}"
    return [*made, _automation("run failed", failed, _tell(block, what, "{{ flow_run.state.message }}"))]


def notifying(there: Automation, block: BlockDocument) -> AutomationCore | None:
    """Return an automation whose notifications go to a block; None if they do already."""
    actions = [
        one.model_copy(update={"block_document_id": block.id}) if isinstance(one, SendNotification) else one
        for one in there.actions
    ]
    if actions == there.actions:
        return None
    return AutomationCore(**there.model_dump(exclude={"id", "owner_resource", "actions"}), actions=actions)


def _automation(name: str, trigger: EventTrigger, action: ActionTypes) -> AutomationCore:
    return AutomationCore(name=f"tinycats: {name}", description="docs/operating.md", trigger=trigger, actions=[action])


def _tell(block: BlockDocument, subject: str, body: str) -> SendNotification:
    return SendNotification(block_document_id=block.id, subject=subject, body=body + PAGE)


def _of_our_flows() -> ResourceSpecification:
    return ResourceSpecification({"prefect.resource.role": "flow", "prefect.resource.name": [*FLOWS]})


def _can(block: BlockDocument) -> bool:
    return block.block_schema is not None and "notify" in block.block_schema.capabilities


if __name__ == "__main__":
    sys.exit(main())
