"""How much more service an account has had than its fair part; a client and a session are accounts.

Virtual time advances by all service given over the number of accounts at work, so it is what an
account would have had, had all shared alike (start-time fair queueing; virtual token counters of
Sheng et al., OSDI 2024). Whoever was away comes back at the present: absence earns nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from .types import Request


@dataclass(slots=True)
class _Account:
    served_s: float
    live: int = 0


class Fairness:
    def __init__(self) -> None:
        self._accounts: dict[tuple[str, str], _Account] = {}
        self._clocks = {"client": 0.0, "session": 0.0}
        self._live = {"client": 0, "session": 0}

    def join(self, request: Request) -> None:
        for key in _keys(request):
            account = self._accounts.setdefault(key, _Account(0.0))
            if not account.live:
                account.served_s = max(account.served_s, self._clocks[key[0]])
                self._live[key[0]] += 1
            account.live += 1
        if len(self._accounts) > 1024 + 2 * sum(self._live.values()):
            self._accounts = {
                key: account
                for key, account in self._accounts.items()
                if account.live or account.served_s > self._clocks[key[0]]
            }

    def leave(self, request: Request) -> None:
        for key in _keys(request):
            account = self._accounts[key]
            account.live -= 1
            if not account.live:
                self._live[key[0]] -= 1
                if account.served_s <= self._clocks[key[0]]:
                    del self._accounts[key]  # its excess is nothing, and so is a new one's

    def charge(self, request: Request, served_s: float) -> None:
        for key in _keys(request):
            self._accounts[key].served_s += served_s
            self._clocks[key[0]] += served_s / self._live[key[0]]

    def excess_s(self, request: Request) -> float:
        """Seconds of the device that its client or session had beyond a fair part, the larger."""
        excess_s = 0.0
        for key in _keys(request):
            excess_s = max(excess_s, self._accounts[key].served_s - self._clocks[key[0]])
        return excess_s


def _keys(request: Request) -> list[tuple[str, str]]:
    keys = [("client", request.client)] if request.client else []
    return [*keys, ("session", request.session)] if request.session else keys
