"""What policies demand of a sandbox's hardening (`SecurityPolicy`), and where a request falls short of it."""

from __future__ import annotations

from collections.abc import Iterator

from tartarus.model.sandbox import Isolation
from tartarus.model.security import CAPABILITIES, SecurityConfig, at_least_action, at_least_lockdown, plain
from tartarus.policy.documents import SecurityPolicy

Shortfall = tuple[str, str]


def shortfalls(asked: SecurityConfig | None, level: Isolation, policy: SecurityPolicy) -> Iterator[Shortfall]:
    """Each thing that the policy does not let be: what is asked for, and what would be accepted.

    What a level gives by itself need not be asked for; what it can't give, it can't be had at.
    """
    config = asked or SecurityConfig()
    if policy.hardened_kernel and not config.hardened_kernel:
        yield "a kernel that is not hardened", "hardened_kernel: true, at the microvm level"
    if not at_least_lockdown(config.kernel_lockdown, policy.kernel_lockdown) and policy.kernel_lockdown is not None:
        yield "a kernel without lockdown", f"kernel_lockdown: {policy.kernel_lockdown.value}, at the microvm level"
    # A module makes no system calls.
    if level is not Isolation.WASM:
        yield from _filter(config, policy)
    yield from _capabilities(config, level, policy)
    if policy.user_namespace and level is Isolation.PROCESS:
        yield "a sandbox without a user namespace", "the container level or a stronger one"


def _filter(config: SecurityConfig, policy: SecurityPolicy) -> Iterator[Shortfall]:
    if policy.seccomp_profiles is not None and config.seccomp_profile not in policy.seccomp_profiles:
        what = f"the profile {config.seccomp_profile}" if config.seccomp_profile else "no system call profile"
        yield what, f"seccomp_profile: {' or '.join(policy.seccomp_profiles) or 'none there is'}"
    if not at_least_action(config.seccomp_default, policy.seccomp_default) and policy.seccomp_default is not None:
        yield "a milder answer to other calls", f"seccomp_default: {policy.seccomp_default.value}"


def _capabilities(config: SecurityConfig, level: Isolation, policy: SecurityPolicy) -> Iterator[Shortfall]:
    banned = SecurityConfig(drop_capabilities=policy.drop_capabilities).dropped
    # A machine's root has every capability that is not dropped; elsewhere nobody has any that is not added.
    had = frozenset(CAPABILITIES) - config.dropped if level is Isolation.MICROVM else config.added
    if had & banned:
        yield f"capabilities: {', '.join(sorted(had & banned))}", "drop_capabilities with these"
    if policy.allowed_capabilities is not None:
        allowed = {plain(name) for name in policy.allowed_capabilities}
        if beyond := config.added - allowed:
            yield (f"added capabilities: {', '.join(sorted(beyond))}",
                   f"add_capabilities of {', '.join(sorted(allowed)) or 'none'}")  # fmt: skip
