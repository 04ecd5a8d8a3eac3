"""Every error a user can meet: a stable code, what happened, why, and what to do.

The class docstring is the error's meaning in the reference; `code` never changes once
released; `exit_status` is what the command line returns and `http_status` what the API answers.
Sandboxed commands own the exit statuses 0 to 123 and 128 to 255; ours are 124 to 127, as in
coreutils' timeout(1) and the shell: 124 time limit, 125 Tartarus failed or refused,
126 found but not executable, 127 not found.
"""

from __future__ import annotations

from typing import ClassVar


class TartarusError(Exception):
    """Tartarus could not do what was asked."""

    code: ClassVar[str] = "internal"
    exit_status: ClassVar[int] = 125
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    sandbox_id = ""
    """The sandbox whose record tells of it too, if there is one."""

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        text = self.what if not self.why else f"{self.what}: {self.why}"
        return text if not self.fix else f"{text} ({self.fix})"


class InvalidRequest(TartarusError):
    """The request is malformed or asks for something out of range; nothing was changed."""

    code = "invalid_request"
    http_status = 400


class TemplateNotFound(TartarusError):
    """No template has that name."""

    code = "template_not_found"
    http_status = 404


class TemplateFailed(TartarusError):
    """The template could not be prepared or warmed."""

    code = "template_failed"
    http_status = 502


class SandboxNotFound(TartarusError):
    """No sandbox of yours has that id or name."""

    code = "sandbox_not_found"
    http_status = 404


class TemplateExists(TartarusError):
    """A template of yours already has that name."""

    code = "template_exists"
    http_status = 409


class TemplateBlocked(TartarusError):
    """The scan policy does not let this template be used."""

    code = "template_blocked"
    http_status = 403


class SnapshotNotFound(TartarusError):
    """No snapshot of yours has that id or name."""

    code = "snapshot_not_found"
    http_status = 404


class SnapshotRefused(TartarusError):
    """The memory snapshot is damaged, foreign, or can't go on here; nothing of it was started."""

    code = "snapshot_refused"
    http_status = 422


class UploadNotFound(TartarusError):
    """No upload of yours has that id; each is used once, and removed after an hour."""

    code = "upload_not_found"
    http_status = 404


class ModuleNotFound(TartarusError):
    """No WebAssembly module of yours has that digest."""

    code = "module_not_found"
    http_status = 404


class ModuleRefused(TartarusError):
    """It is no WebAssembly module or component that can be compiled here."""

    code = "module_refused"
    http_status = 422


class ImageNotFound(TartarusError):
    """The registry or archive has no such image."""

    code = "image_not_found"
    http_status = 404


class ImageRefused(TartarusError):
    """The image is damaged, dishonest, or not for this host; nothing of it is kept."""

    code = "image_refused"
    http_status = 422


class RegistryFailed(TartarusError):
    """The image registry could not be reached, or did not answer as it should."""

    code = "registry_failed"
    http_status = 502


class BuildFailed(TartarusError):
    """A step of a Dockerfile failed."""

    code = "build_failed"
    http_status = 422


class ContextNotFound(TartarusError):
    """No code context of this sandbox has that id."""

    code = "context_not_found"
    http_status = 404


class NameTaken(TartarusError):
    """A live sandbox of yours already has that name."""

    code = "name_taken"
    http_status = 409


class InvalidState(TartarusError):
    """The sandbox's state does not allow that action."""

    code = "invalid_state"
    http_status = 409


class SandboxLost(TartarusError):
    """The sandbox ended because the daemon, the host or its guest agent went away."""

    code = "sandbox_lost"
    http_status = 410


class NotExecutable(TartarusError):
    """The command was found but can't be executed."""

    code = "not_executable"
    exit_status = 126
    http_status = 422


class CommandNotFound(TartarusError):
    """The command does not exist in the sandbox."""

    code = "command_not_found"
    exit_status = 127
    http_status = 422


class FileFailed(TartarusError):
    """A file operation in the sandbox failed."""

    code = "file_failed"
    http_status = 422


class TimeLimit(TartarusError):
    """The time limit passed."""

    code = "time_limit"
    exit_status = 124
    http_status = 408


class ResourceLimit(TartarusError):
    """The sandbox reached one of its limits and was killed for it."""

    code = "resource_limit"
    http_status = 422


class PermissionRefused(TartarusError):
    """You may not do that."""

    code = "permission_refused"
    http_status = 403


class IsolationUnavailable(TartarusError):
    """This host can't give the isolation level that was asked for."""

    code = "isolation_unavailable"
    http_status = 501


class PolicyNotFound(TartarusError):
    """No policy has that id, or that version."""

    code = "policy_not_found"
    http_status = 404


class LamentationNotFound(TartarusError):
    """No failure of yours has that id."""

    code = "lamentation_not_found"
    http_status = 404


class CaseNotFound(TartarusError):
    """No quarantined sandbox has that id or name."""

    code = "case_not_found"
    http_status = 404


class Quarantined(TartarusError):
    """The sandbox is quarantined: the daemon's owner decides what becomes of it."""

    code = "quarantined"
    http_status = 423


class RequestRejected(TartarusError):
    """A judge refused the request by the policies in force; nothing was made."""

    code = "rejected"
    http_status = 403


class ProfileNotFound(TartarusError):
    """There is no system call profile of that name for you."""

    code = "profile_not_found"
    http_status = 404


class SecretRefused(TartarusError):
    """A secret that was asked for is not one that this sandbox may have."""

    code = "secret_refused"
    http_status = 403


class SecretNotFound(TartarusError):
    """The vault has no such secret."""

    code = "secret_not_found"
    http_status = 404


class SecretUnavailable(TartarusError):
    """A secret could not be had from where it is kept, or could not be delivered."""

    code = "secret_unavailable"
    http_status = 502


class Unsupported(TartarusError):
    """This isolation level does not have that capability."""

    code = "unsupported"
    http_status = 501


class NoSpace(TartarusError):
    """The host is out of disk, memory, processes or another resource."""

    code = "no_space"
    http_status = 507


class DaemonUnavailable(TartarusError):
    """The daemon is not running, did not start, or did not answer."""

    code = "daemon_unavailable"
    http_status = 503
    retryable = True


class VersionMismatch(TartarusError):
    """The daemon is of another version than this client."""

    code = "version_mismatch"
    http_status = 409


class GuestFailed(TartarusError):
    """The guest could not be started, or broke its protocol."""

    code = "guest_failed"
    http_status = 502


class PortFailed(TartarusError):
    """What listens at a sandbox's port gave no answer that can be passed on."""

    code = "port_failed"
    http_status = 502


class ContainerNotFound(TartarusError):
    """The other engine has no such container or image."""

    code = "container_not_found"
    http_status = 404


class EngineFailed(TartarusError):
    """Another container engine could not be reached, refused, or did not answer as it should."""

    code = "engine_failed"
    http_status = 502


class MigrationRefused(TartarusError):
    """The container holds what no sandbox is given, or what was to be made is there already; nothing was made."""

    code = "migration_refused"
    http_status = 422


def registry() -> dict[str, type[TartarusError]]:
    """Every error class by its code. One that only narrows another's meaning keeps its code, and is not here."""
    found: dict[str, type[TartarusError]] = {TartarusError.code: TartarusError}
    pending = TartarusError.__subclasses__()
    while pending:
        cls = pending.pop()
        if "code" in vars(cls):
            found[cls.code] = cls
        pending.extend(cls.__subclasses__())
    return found


def from_code(code: str, what: str, *, why: str = "", fix: str = "") -> TartarusError:
    """Rebuild an error that crossed a wire."""
    return registry().get(code, TartarusError)(what, why=why, fix=fix)
