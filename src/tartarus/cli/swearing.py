"""`swear`: another contract for a sandbox that lives."""

from __future__ import annotations

import click
import msgspec

from tartarus.cli.complete import sandboxes
from tartarus.cli.launching import parameter
from tartarus.cli.options import RUN
from tartarus.cli.show import print_json
from tartarus.model.errors import InvalidRequest

_PARAMETERS: list[click.Parameter] = [
    click.Argument(["sandbox"], shell_complete=sandboxes),
    *(parameter(option) for option in RUN if option.name in {"network", "allow"}),
    click.Option(["as_json", "--json"], is_flag=True, help="Print the network's state as one JSON object."),
]


@click.command(params=_PARAMETERS)
def swear(sandbox: str, network: str, allow: tuple[str, ...], *, as_json: bool) -> int:
    """Hold a live sandbox to another contract, from one moment on.

    No packet passes that neither the old one nor the new one allows; what the new one does not open ends then. With
    --network none nothing is open. Policies are asked as for a new sandbox, and the audit log says what was sworn.
    """
    from tartarus.sdk import Sandbox
    from tartarus.sdk.networks import sworn

    given = click.get_current_context().get_parameter_source("network")
    if given is click.core.ParameterSource.DEFAULT and not allow:
        raise InvalidRequest("no contract was given", fix="use --allow or --network")
    connected = Sandbox.connect(sandbox)
    state = connected.swear(sworn(network, allow))
    if as_json:
        print_json(msgspec.to_builtins(state))
        return 0
    contract = state.contract
    assert contract is not None
    opened = [_words(str(to), ports) for to, ports in (*contract.networks(), *contract.domains())]
    click.echo(f"{connected.id} may now reach {', '.join(opened) or 'nothing'}")
    return 0


def _words(to: str, ports: tuple[int, ...]) -> str:
    return f"{to}:{','.join(map(str, ports))}" if ports else to
