"""Who owns which slot and pages, and in which phase everybody is. Carries out; decides nothing.

Plans take effect on the device in the order they are made. So a sequence gives slot and pages back
the moment it is preempted or over, whatever of it is still in flight: that has been read and
written before the next owner's turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, KeysView
from dataclasses import dataclass, field

from .host import HostIndex
from .pages import PagePool
from .prefix import PrefixIndex, extend_chain, root_digest, tail_digest
from .sequence import Limits, Sequence
from .types import Finish, Phase
from .waiting import WaitingQueue


@dataclass(slots=True)
class Match:
    """What is known of a sequence's beginning, page by page: on the device, or None where it must
    come from host memory, whose pages are `host_pages`."""

    pages: list[int | None] = field(default_factory=list)
    host_pages: list[int] = field(default_factory=list)
    positions: int = 0
    host_positions: int = 0  # of them, in host memory

    @property
    def on_device(self) -> list[int]:
        return [page for page in self.pages if page is not None]

    def add(self, page: int | None, host_page: int | None, positions: int) -> bool:
        """One more page of so many positions, if it is anywhere."""
        if page is None:
            if host_page is None:
                return False
            self.host_pages.append(host_page)
            self.host_positions += positions
        self.pages.append(page)
        self.positions += positions
        return True


class Books:
    """`saves`, set before each plan, says whether a page that must go is worth a copy in host
    memory; `last` which of those who wait can do without its pages for longest: a policy's
    answers."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.sequences: dict[int, Sequence] = {}  # everybody not DONE, by request id
        self.running: dict[int, Sequence] = {}
        self.returning: dict[int, Sequence] = {}  # preempted, their last token still in flight
        self.waiting = WaitingQueue()
        self.away = WaitingQueue()  # of those who wait, those whose pages must be fetched first
        self.pool = PagePool(limits.num_pages)
        self.index = PrefixIndex(self.pool, self._evicted)
        self.host = HostIndex(limits.host_pages)
        self.free_slots = list(range(limits.max_slots - 1, -1, -1))
        self.swap_out: list[tuple[int, int]] = []  # of the plan being made
        self.swap_in: dict[int, int] = {}  # device page -> host page
        self.spare_copies = 0  # that this plan may make of pages which nobody is known to want
        self.saves = False
        self.last: Callable[[KeysView[int]], int] = max

    def enter(self, seq: Sequence) -> None:
        """A new sequence; its prompt's digests are made here, once."""
        self._extend_chain(seq, seq.prompt_tokens)
        self.sequences[seq.id] = seq

    def match(self, seq: Sequence, with_host: bool = True) -> Match:
        """Pages that begin as `seq` does and that it may use."""
        size, most = self.limits.page_size, seq.shareable_tokens
        find, found = self.index.find, Match()
        find_host = self.host.find if with_host else lambda digest: None
        for digest in seq.chain[: most // size]:
            page = find(digest)
            if not found.add(page, find_host(digest) if page is None else None, size):
                break
        if seq.tail is not None and seq.tail[0] // size == len(found.pages) and seq.tail[0] <= most:
            positions, digest = seq.tail
            found.add(find(digest), find_host(digest), positions - found.positions)
        return found if found.positions >= seq.source else Match()

    def admit(self, seq: Sequence, found: Match, total: int) -> None:
        """Give `seq` a slot, what was found, and new pages up to `total`."""
        size, on_device = self.limits.page_size, found.on_device
        seq.move(Phase.RUNNING)
        seq.slot = self.free_slots.pop()
        self.index.share(on_device)
        self.host.pin(found.host_pages)
        new = self.index.take(total - len(on_device), self.last)
        self.swap_in |= zip(new, found.host_pages, strict=False)
        rest = iter(new)
        seq.pages = [next(rest) if page is None else page for page in found.pages]
        full = found.positions // size
        for digest, page in zip(seq.chain[:full], seq.pages, strict=False):
            self.index.offer(digest, page)
        for digest in reversed(seq.chain[:full]):
            self.host.touch(digest)
        if seq.tail is not None:
            if len(found.pages) > full and found.pages[full] is not None:
                self.index.withdraw(seq.pages[full])
            self.host.outdate(seq.tail[1])  # it is about to be written further
            seq.tail = None
        seq.pages += rest
        self.index.unkeep(seq.id)
        seq.indexed_pages = full
        seq.next_full = (full + 1) * size
        seq.sent_pages = 0
        seq.planned = seq.computed = found.positions
        seq.charged = max(seq.charged, seq.computed)
        self.running[seq.id] = seq

    def grow(self, seq: Sequence, pages: int = 1) -> None:
        seq.pages += self.index.take(pages, self.last)

    def share_full_pages(self, seq: Sequence) -> None:
        """Offer the pages that `computed` now fills."""
        self._offer(seq, seq.computed // self.limits.page_size)

    def _offer(self, seq: Sequence, full: int) -> None:
        size = self.limits.page_size
        self._extend_chain(seq, full * size)
        for page in range(seq.indexed_pages, full):
            self.index.offer(seq.chain[page], seq.pages[page])
        seq.indexed_pages = max(full, seq.indexed_pages)
        seq.next_full = (seq.indexed_pages + 1) * size

    def preempt(self, seq: Sequence) -> bool:
        """Take `seq` off the device; what it computed stays known by name. True: it may wait now;
        otherwise it returns when its last token is known. All positions planned are of known
        tokens, so their names can be given before they are written."""
        size = self.limits.page_size
        full, rest = divmod(seq.planned, size)
        self._offer(seq, full)
        if rest:
            asked = seq.request
            root = root_digest(asked.cache_salt, asked.adapter)
            parent = seq.chain[full - 1] if full else root
            digest = tail_digest(parent, seq.tokens[full * size : seq.planned])
            self.index.offer(digest, seq.pages[full])
            seq.tail = seq.planned, digest
        self._give_back(seq, keeper=seq.id)
        seq.move(Phase.WAITING)
        if seq.in_flight:
            self.returning[seq.id] = seq
        return not seq.in_flight

    def _give_back(self, seq: Sequence, keeper: int | None = None) -> None:
        del self.running[seq.id]
        self.index.release(seq.pages, keeper)
        self.free_slots.append(seq.slot)
        seq.pages, seq.slot, seq.lookup = [], -1, None
        seq.planned = seq.computed = seq.sent_pages = seq.indexed_pages = 0

    def end(self, seq: Sequence, reason: Finish) -> None:
        """`seq` is over and owns nothing; it is forgotten when nothing of it is in flight."""
        seq.finish = reason
        if seq.phase is Phase.WAITING:
            self.waiting.discard(seq)
            self.away.discard(seq)
            self.returning.pop(seq.id, None)
            self.index.unkeep(seq.id)
        else:
            self._give_back(seq)
        if seq.tail is not None:
            self.host.outdate(seq.tail[1])
        seq.move(Phase.ENDING if seq.in_flight else Phase.DONE)
        if not seq.in_flight:
            del self.sequences[seq.id]

    def landed(self, seq: Sequence) -> bool:
        """Nothing of `seq` is in flight any more. True: the caller queues it again."""
        if seq.phase is Phase.ENDING:
            seq.move(Phase.DONE)
            del self.sequences[seq.id]
        return self.returning.pop(seq.id, None) is not None

    # The host tier

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.away)

    def queue(self, seq: Sequence) -> None:
        """It waits, or waits under another rank now."""
        (self.away if seq.is_away else self.waiting).push(seq)

    def send_away(self, seq: Sequence) -> None:
        """It must be fetched before it may enter."""
        seq.is_away = True
        if seq in self.waiting:
            self.waiting.discard(seq)
            self.away.push(seq)

    def make_ready(self, seq: Sequence) -> None:
        """It may enter: what it lacks on the device is fetched, or not worth it."""
        seq.is_away = False
        self.away.discard(seq)
        self.waiting.push(seq)

    def _evicted(self, page: int, digest: bytes, keeper: int | None) -> None:
        self.swap_in.pop(page, None)  # fetched by this very plan, for nothing
        if digest in self.host:
            self.host.touch(digest)  # the only copy now
        elif keeper is None:
            # Perhaps a prefix of somebody to come: worth a copy that nobody waits for.
            if self.spare_copies > 0 and self.saves and self.save(page, digest):
                self.spare_copies -= 1
        elif not self.saves or not self.save(page, digest):
            return
        if keeper is not None:
            self.send_away(self.sequences[keeper])

    def save(self, page: int, digest: bytes) -> bool:
        """Copy `page` to host memory with this plan, if there is room to be made."""
        target = self.host.put(digest) if self.host.count else None
        if target is not None:
            self.swap_out.append((page, target))
        return target is not None

    def fetch(self, seq: Sequence, found: Match, count: int) -> None:
        """Bring the first `count` of a waiting sequence's host pages to the device. All that it
        then has there is kept for it, so that the last pages are the first to go."""
        host_pages = found.host_pages[:count]
        self.host.pin(host_pages)
        self.index.share(found.on_device)  # not to be taken for the others
        new = self.index.take(count, self.last)
        self.swap_in |= zip(new, host_pages, strict=True)
        rest = iter(new)
        size = self.limits.page_size
        names = seq.chain[: found.positions // size]
        if len(names) < len(found.pages):
            assert seq.tail is not None
            names.append(seq.tail[1])
        pages: list[int] = []
        for digest, known in zip(names, found.pages, strict=True):
            page = next(rest, None) if known is None else known
            if page is None:
                pages += found.on_device[len(pages) - count :]
                break
            if known is None:
                self.index.offer(digest, page)
                seq.fetched += min(size, found.positions - len(pages) * size)
            pages.append(page)
        self.index.release(pages, keeper=seq.id)

    def take_swaps(self) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
        """Out and in, for the plan that is made now."""
        swaps = tuple(self.swap_out), tuple((host, page) for page, host in self.swap_in.items())
        self.swap_out, self.swap_in = [], {}
        self.host.unpin()
        return swaps

    def _extend_chain(self, seq: Sequence, end: int) -> None:
        size = self.limits.page_size
        if end // size > len(seq.chain):
            asked = seq.request
            extend_chain(seq.chain, seq.tokens, size, asked.cache_salt, end, asked.adapter)

    def check(self) -> None:
        """Raise AssertionError when the books do not balance."""
        held: dict[int, int] = {}
        slots = list(self.free_slots)
        ready = {seq.id for seq in self.waiting.members()}
        away = {seq.id for seq in self.away.members()}
        assert not ready & away, "a sequence waits twice"
        assert all(self.sequences[i].is_away for i in away), "away, and does not know"
        assert not any(self.sequences[i].is_away for i in ready), "ready, and does not know"
        waiting = ready | away
        for seq in self.sequences.values():
            self._check_sequence(seq, seq.id in waiting)
            for page in seq.pages:
                held[page] = held.get(page, 0) + 1
            if seq.slot >= 0:
                slots.append(seq.slot)
        self.index.check(held)
        self.host.check()
        assert sorted(slots) == list(range(self.limits.max_slots)), "a slot lost or owned twice"
        assert self.running.keys() == {s.id for s in self.sequences.values() if s.slot >= 0}
        assert self.index.keepers <= waiting | self.returning.keys(), "pages kept for nobody"
        assert not self.swap_out, "a copy outlived its plan"
        assert not self.swap_in, "a copy outlived its plan"
        for keeper in self.index.keepers:
            self._check_kept(self.sequences[keeper])

    def _check_sequence(self, seq: Sequence, queued: bool) -> None:
        name = f"request {seq.id}"
        waits = seq.phase is Phase.WAITING
        assert (queued or seq.id in self.returning) == waits, f"{name}: {seq.phase}, {queued}"
        assert not (queued and seq.in_flight), f"{name} waits in flight"
        assert (seq.id in self.returning) == (waits and seq.in_flight > 0), f"{name}: returning"
        assert (seq.phase is Phase.RUNNING) == (seq.slot >= 0), f"{name}: slot"
        assert (seq.finish is not None) == (seq.phase is Phase.ENDING), f"{name}: {seq.finish}"
        assert seq.in_flight or seq.phase is not Phase.ENDING, f"{name} should be forgotten"
        assert 0 <= seq.pending <= seq.in_flight <= 2, f"{name}: in flight"
        assert len(seq.tokens) + seq.pending <= seq.limit, f"{name}: too many tokens"
        if seq.slot < 0:
            assert not seq.pages, f"{name} has pages and no slot"
            return
        assert (seq.computed == seq.planned) or seq.in_flight, f"{name}: planned, never run"
        assert seq.computed <= seq.planned <= seq.target, f"{name}: planned beyond its end"
        assert seq.planned <= len(seq.pages) * self.limits.page_size, f"{name}: too few pages"
        assert seq.sent_pages <= len(seq.pages), f"{name}: pages sent"
        assert len(set(seq.pages)) == len(seq.pages), f"{name} holds a page twice"
        for page, digest in zip(seq.pages, seq.chain, strict=False):
            assert self.index.name(page) in (None, digest), f"{name} writes a page of another name"

    def _check_kept(self, seq: Sequence) -> None:
        """The last page is the first to go, or those before it would be kept in vain."""
        place = {digest: position for position, digest in enumerate(seq.chain)}
        if seq.tail is not None:
            place[seq.tail[1]] = len(place)
        kept = [place[self.index.digest(page)] for page in self.index.kept(seq.id)]
        assert kept == sorted(kept, reverse=True), f"request {seq.id}: kept in order {kept}"
