"""One step being decided: which running sequences go on, who enters, who must make room.

Decodes come first, then prompt chunks and new sequences by rank from what is left of the token
budget. Room is only ever taken from lower ranks, so the first in rank always moves.
"""

from __future__ import annotations

from collections import deque

from .books import Books, Match
from .cost import QUERY_BLOCK, CostModel, StepLoad
from .ordering import Policy
from .room import Room
from .sequence import Sequence, by_rank
from .speculate import Guesses, Speculation
from .types import Admission, Plan, Work

_LOOK_AHEAD = 32  # waiting sequences passed over for want of pages before a step stops looking
_COPY_SHARE = 0.05  # of a step's time that copies ahead of need may add where nothing hides them


class Draft:
    """Filled once by `make`, then thrown away. `speculation` guesses for rows; None: nobody."""

    def __init__(
        self,
        books: Books,
        room: Room,
        policy: Policy,
        cost: CostModel,
        now: float,
        speculation: Speculation | None = None,
    ) -> None:
        self._books = books
        self._limits = books.limits
        self._room = room
        self._policy = policy
        self._cost = cost
        self._now = now
        self._speculation = speculation
        self._rows: dict[int, Sequence] = {}  # run one token each
        self._prefills: list[Sequence] = []
        self._chunks: list[tuple[Sequence, int]] = []
        self._chunk_tokens = 0
        self._kv_tokens = 0
        self._admissions: list[Admission] = []
        self._admitted: list[Sequence] = []
        self._wanted_pages = 0  # by those who may not enter before more can be taken at once
        self._aside: list[Sequence] = []  # to be queued again when the scan is over
        self.preemptions = 0
        self.hit_tokens = 0  # of admitted sequences, found in the cache
        self.host_hit_tokens = 0  # of them, in host memory

    def make(self, step: int) -> Plan | None:
        """The plan, or None when nothing can run now."""
        self._room.begin()
        growing = self._collect()
        self._books.spare_copies = self._copies_left(0.0) // 2
        if growing:
            self._grow(growing)
        if len(self._books.away):
            self._fetch()
        self._fill()
        for seq in self._aside:
            self._books.queue(seq)
        if self._limits.host_pages and self._policy.swaps:
            self._write_behind()
        guesses = self._guess() if self._rows and self._speculation is not None else {}
        rows = [self._work(seq, 1) for seq in self._rows.values() if seq.id not in guesses]
        rows += [self._work(seq, count) for seq, count in self._chunks if count == 1]
        ones = len(rows)
        rows += [self._work(self._rows[id], 1, guessed) for id, guessed in guesses.items()]
        rows += [self._work(seq, count) for seq, count in self._chunks if count > 1]
        swap_out, swap_in = self._books.take_swaps()
        if not rows and not swap_out and not swap_in:
            return None
        ahead = sum(map(len, guesses.values()))
        prefill_tokens = len(self._rows) + self._chunk_tokens + ahead - ones
        load = StepLoad(prefill_tokens, ones, self._kv_tokens, len(swap_out), len(swap_in))
        return Plan(step, tuple(self._admissions), tuple(rows), swap_out, swap_in, load, ahead)

    @property
    def _budget(self) -> int:
        return self._limits.step_tokens - len(self._rows) - self._chunk_tokens

    # Those who run already

    def _collect(self) -> list[Sequence]:
        """Sort the running into rows and prefills; returns the rows that need another page."""
        growing = []
        rows, page_size = self._rows, self._limits.page_size
        for seq in self._books.running.values():
            known, target, planned = len(seq.tokens) + seq.pending, seq.target, seq.planned
            left = (known if known < target else target) - planned  # seq.left, without the call
            if left == 1:
                rows[seq.id] = seq
                if planned == len(seq.pages) * page_size:
                    growing.append(seq)
            elif left > 1:
                self._prefills.append(seq)
        return growing

    def _grow(self, growing: list[Sequence]) -> None:
        """A page for each; where there are too few, lower ranks give theirs or stand still."""
        if len(growing) > self._books.index.available:
            growing.sort(key=by_rank)
        for seq in growing:
            if seq.id not in self._rows:
                continue  # has just made room for a better one
            if self._make_room(seq, pages=1):
                self._books.grow(seq)
            else:
                del self._rows[seq.id]

    # Tokens ahead of what is known

    def _guess(self) -> Guesses:
        """What rows run beside their token, in what is left of the budget and of nobody's pages."""
        assert self._speculation is not None
        drawn = len(self._rows) + len(self._chunks)
        room = min(self._budget, self._limits.step_samples - drawn)
        if room <= 0:
            return {}
        rows = list(self._rows.values())
        load = StepLoad(self._chunk_tokens, len(rows), sum(seq.planned + 1 for seq in rows))
        guesses: Guesses = {}
        for seq_id, guessed in self._speculation.choose(rows, load, room).items():
            seq = self._rows[seq_id]
            lacking = self._limits.pages_for(seq.planned + 1 + len(guessed)) - len(seq.pages)
            most = max(0, self._books.index.disposable - self._policy.reserve_pages)
            if min(lacking, most) > 0:
                self._books.grow(seq, min(lacking, most))
            fits = len(seq.pages) * self._limits.page_size - seq.planned - 1
            if fits > 0:
                guesses[seq_id] = guessed[:fits]
        return guesses

    # Prompt chunks and admissions

    def _fill(self) -> None:
        prefills = deque(sorted(self._prefills, key=by_rank))
        waiting = self._books.waiting
        looks = _LOOK_AHEAD
        while True:
            head = waiting.peek() if looks and self._is_open() else None
            if prefills and (head is None or prefills[0].rank < head.rank):
                if not self._budget:
                    return
                seq = prefills.popleft()
                if seq.slot >= 0:
                    self._chunk(seq)
            elif head is None:
                return
            else:
                waiting.pop()
                if not self._admit(head):
                    self._aside.append(head)
                    looks -= 1

    def _is_open(self) -> bool:
        """Whether looking at the next waiting sequence can come to anything."""
        books, head = self._books, self._books.waiting.peek()
        slot_free = bool(books.free_slots)
        if head is None or not (self._budget if slot_free else self._policy.preempts):
            return False
        if not self._policy.takes(head, len(books.running)):
            return False
        running = self._room.running
        if running and running[-1].rank > head.rank:
            return True
        betters = len(running) + len(self._admissions)  # see _admit
        return slot_free and books.index.available > betters

    def _chunk(self, seq: Sequence) -> None:
        count = min(seq.left, self._budget)
        self._chunks.append((seq, count))
        self._chunk_tokens += count

    def _admit(self, seq: Sequence) -> bool:
        """Let `seq` in, making room where lower ranks have it, or change nothing."""
        books, policy = self._books, self._policy
        found = self._match(seq)
        total = self._limits.pages_for(seq.entry_tokens)
        private = total - len(found.on_device)
        if self._limits.host_pages and policy.swaps and books.running:
            # What must leave for it may have to be copied: not more than the step can bear.
            copies = len(found.host_pages) + self._room.dirty(private)
            if copies and copies > self._copies_left():
                self._wanted_pages = max(self._wanted_pages, private)
                if found.host_pages:
                    books.send_away(seq)
                return False
        # A page for everybody before it, or their next page would throw it out again at once.
        pages = private + self._room.better(seq) + len(self._admitted)
        tokens = 1 if found.positions >= seq.source else seq.source + 1
        if not self._make_room(seq, pages=pages, slots=1, tokens=tokens, keep=found.on_device):
            return False
        books.admit(seq, found, total)
        self._room.changed()
        policy.run(seq, self._now, self._cost.move_s(0, total))
        self._count_hits(seq, found)
        if seq.proposal is not None:
            seq.proposal.lose()  # with the slot it had
        self._admitted.append(seq)
        asked, adapter = seq.request, seq.request.adapter
        self._admissions.append(
            Admission(
                *(seq.id, seq.slot, tuple(seq.tokens), seq.prompt_tokens, asked.sampling),
                adapter=0 if adapter is None else adapter.index,
            )
        )
        self._chunk(seq)
        return True

    def _match(self, seq: Sequence) -> Match:
        """What to take from the caches: host pages only where copying beats computing."""
        found = self._books.match(seq)
        if found.host_pages:
            without = self._books.match(seq, with_host=False)
            saved = found.positions - without.positions
            saved_s = saved * self._cost.token_s(self._limits.step_tokens)
            if self._cost.move_s(0, len(found.host_pages)) >= saved_s:
                return without
        return found

    def _count_hits(self, seq: Sequence, found: Match) -> None:
        self.hit_tokens += found.positions
        fetched = min(seq.fetched, found.positions - found.host_positions)
        self.host_hit_tokens += found.host_positions + fetched
        seq.fetched = 0
        if seq.queued_s < 0:
            seq.queued_s, seq.cached_tokens = self._now - seq.submitted, seq.planned

    # Room

    def _make_room(
        self,
        seq: Sequence,
        *,
        pages: int,
        slots: int = 0,
        tokens: int = 0,
        keep: list[int] | None = None,
    ) -> bool:
        """Whether so much is free, after preempting lower ranks where that is of use."""
        victims = self._room.victims(seq, pages, slots, keep or [])
        if victims is None or tokens > self._budget + sum(v.id in self._rows for v in victims):
            return False
        for victim in victims:
            self._preempt(victim)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._rows.pop(victim.id, None)
        self.preemptions += 1
        if self._books.preempt(victim):
            self._policy.wait(victim, self._now)
            self._aside.append(victim)
        self._room.left(victim)

    # Copies ahead of need (FastServe section 4.2: proactive swapping, idle pages)

    def _fetch(self) -> None:
        """Bring back what had to leave, best rank first: as much as the step hides and the policy
        allows. Nobody waits on the device for copies of another."""
        books = self._books
        most = self._copies_left()
        is_idle = not books.running and books.waiting.peek() is None
        while (head := books.away.peek()) is not None and (is_idle or self._wants(head)):
            found = self._match(head)
            lacking = len(found.host_pages)
            count = min(lacking, most, self._room_for(head, found))
            if count > 0:
                books.fetch(head, found, count)
                self._room.fetched(head)
                most -= count
            if count < lacking and not is_idle:
                return
            books.make_ready(head)
            is_idle = False

    def _wants(self, head: Sequence) -> bool:
        """Whether `head` would enter if it were here, or there is room to bring it early."""
        if self._books.free_slots or self._books.index.disposable > self._policy.reserve_pages:
            return True
        return self._policy.preempts and self._room.running[-1].rank > head.rank

    def _room_for(self, head: Sequence, found: Match) -> int:
        """Pages that `head` may take: nobody's, and those of the one that can wait longest."""
        index, sequences = self._books.index, self._books.sequences
        room = index.disposable - index.others_among(found.on_device, head.id)
        if index.keepers:
            last = self._room.last(index.keepers)
            if last != head.id and sequences[last].rank > head.rank:
                room += len(index.kept(last))
        return max(room, 0)

    def _write_behind(self) -> None:
        """Keep pages that can be taken at once, nobody's or with a copy already: as many as the
        policy reserves, and as were wanted in vain."""
        index, books = self._books.index, self._books
        short = max(self._policy.reserve_pages, self._wanted_pages) - index.disposable
        if short <= 0 or not (index.keepers or self._wanted_pages):
            return
        most = self._copies_left()
        for page, digest in self._room.next_to_go(short):
            if most <= 0:
                return
            if digest not in books.host:
                most -= books.save(page, digest)

    def _copies_left(self, credit_s: float | None = None) -> int:
        """How many more pages this step may move: what its compute hides, and what it may be
        longer for, by the policy unless given."""
        cost, books = self._cost, self._books
        page_s = max(cost.page_out_s, cost.page_in_s)
        if page_s <= 0:
            return self._limits.num_pages
        step_s = cost.compute_s(StepLoad(self._chunk_tokens, len(self._rows)))
        left_s = step_s * (1.0 if cost.overlaps else _COPY_SHARE)
        left_s += self._policy.copy_credit_s() if credit_s is None else credit_s
        left_s -= cost.move_s(len(books.swap_out), len(books.swap_in))
        return int(min(max(left_s / page_s, 0.0), self._limits.num_pages))

    def _work(self, seq: Sequence, count: int, guesses: tuple[int, ...] = ()) -> Work:
        start, first_page = seq.planned, seq.sent_pages
        end = seq.planned = start + count
        known = len(seq.tokens) + seq.pending
        samples = end == known and known < seq.limit
        seq.in_flight += 1
        if samples:
            seq.pending += 1
        if guesses:  # run, and not counted on
            count += len(guesses)
            end += len(guesses)
        self._kv_tokens += end if count == 1 else end * -(-count // QUERY_BLOCK)
        pages: tuple[int, ...] = ()
        if first_page * self._limits.page_size < end:
            seq.sent_pages = self._limits.pages_for(end)
            pages = tuple(seq.pages[first_page : seq.sent_pages])
        return Work(seq.id, seq.slot, start, count, first_page, pages, samples, guesses)
