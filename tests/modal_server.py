"""A loopback server that speaks as much of Modal's protocol as the project asks for."""

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpclib
import grpclib.server
import modal
import pytest
from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2
from modal_proto.api_grpc import ModalClientBase


def without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what Modal's library would find on this machine."""
    for name in [name for name in os.environ if name.startswith("MODAL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("modal.config._user_config", {})  # what ~/.modal.toml held when modal was imported


FUNCTION = api_pb2.FunctionHandleMetadata(function_name="train_generator", supported_input_formats=[api_pb2.DATA_FORMAT_PICKLE])


class Server(ModalClientBase):
    """As much of Modal's control plane as a training needs. `answers` overrides answers, `asked` keeps requests."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}

    async def _answer(self, name: str, stream: Any, usual: Any) -> None:
        self.asked[name] = await stream.recv_message()
        answer = self.answers.get(name, usual)
        if answer == "nothing":
            await asyncio.sleep(60)
        if isinstance(answer, grpclib.Status):
            raise grpclib.GRPCError(answer, "said the server")
        await stream.send_message(answer)

    async def ClientHello(self, stream: Any) -> None:
        await self._answer("ClientHello", stream, api_pb2.ClientHelloResponse())

    async def FunctionGet(self, stream: Any) -> None:
        function = api_pb2.FunctionData(ranked_functions=[api_pb2.FunctionData.RankedFunction()])
        usual = api_pb2.FunctionGetResponse(function_id="fu-1", handle_metadata=FUNCTION, function=function)
        await self._answer("FunctionGet", stream, usual)

    async def FunctionBindParams(self, stream: Any) -> None:
        usual = api_pb2.FunctionBindParamsResponse(bound_function_id="fu-2", handle_metadata=FUNCTION)
        await self._answer("FunctionBindParams", stream, usual)

    async def FunctionMap(self, stream: Any) -> None:
        item = api_pb2.FunctionPutInputsResponseItem(input_id="in-1")
        usual = api_pb2.FunctionMapResponse(function_call_id="fc-1", pipelined_inputs=[item])
        await self._answer("FunctionMap", stream, usual)

    async def FunctionGetOutputs(self, stream: Any) -> None:
        await self._answer("FunctionGetOutputs", stream, api_pb2.FunctionGetOutputsResponse(num_unfinished_inputs=1))

    async def FunctionCallCancel(self, stream: Any) -> None:
        await self._answer("FunctionCallCancel", stream, Empty())

    async def VolumeGetOrCreate(self, stream: Any) -> None:
        await self._answer("VolumeGetOrCreate", stream, api_pb2.VolumeGetOrCreateResponse(volume_id="vo-1"))

    async def VolumeListFiles(self, stream: Any) -> None:
        entry = api_pb2.FileEntry(path="datasets/abc/images.safetensors", size=7, mtime=1_700_000_000)
        await self._answer("VolumeListFiles", stream, api_pb2.VolumeListFilesResponse(entries=[entry]))

    async def VolumeRemoveFile(self, stream: Any) -> None:
        await self._answer("VolumeRemoveFile", stream, Empty())

    async def DictGetOrCreate(self, stream: Any) -> None:
        await self._answer("DictGetOrCreate", stream, api_pb2.DictGetOrCreateResponse(dict_id="di-1"))

    async def DictUpdate(self, stream: Any) -> None:
        await self._answer("DictUpdate", stream, api_pb2.DictUpdateResponse(created=False))

    async def DictGet(self, stream: Any) -> None:
        await self._answer("DictGet", stream, api_pb2.DictGetResponse(found=False))

    async def SecretGetOrCreate(self, stream: Any) -> None:
        await self._answer("SecretGetOrCreate", stream, api_pb2.SecretGetOrCreateResponse(secret_id="st-1"))

    async def VolumeGetFile2(self, stream: Any) -> None:
        await self._answer("VolumeGetFile2", stream, grpclib.Status.NOT_FOUND)

    async def MountPutFile(self, stream: Any) -> None:
        await self._answer("MountPutFile", stream, api_pb2.MountPutFileResponse(exists=True))

    async def VolumePutFiles(self, stream: Any) -> None:
        await self._answer("VolumePutFiles", stream, Empty())


Server.__abstractmethods__ = frozenset()  # the calls that nobody makes need no answer


@contextmanager
def loopback_modal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Run a server, with credentials for it in the environment."""
    without_credentials(monkeypatch)
    service = Server()  # pyright: ignore[reportAbstractUsage]
    loop, port = asyncio.new_event_loop(), []
    started, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        grpc = grpclib.server.Server([service])
        await grpc.start("127.0.0.1", 0)
        port.append(grpc._server.sockets[0].getsockname()[1])  # pyright: ignore
        started.set()
        await stop.wait()
        grpc.close()
        await grpc.wait_closed()

    thread = threading.Thread(target=loop.run_until_complete, args=[serve()], daemon=True)
    thread.start()
    assert started.wait(10)
    monkeypatch.setenv("MODAL_SERVER_URL", f"http://127.0.0.1:{port[0]}")
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-123")
    monkeypatch.setenv("MODAL_TOKEN_SECRET", "as-topsecret")
    yield service
    modal.Client.from_env().close()
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()
