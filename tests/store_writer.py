"""A process that records, takes and commits studies until it is killed; a line for each."""

from __future__ import annotations

import itertools
import sys

from ledger import done, folder, new_result, outcome, record, take

from mura_batch.store import Store

if __name__ == "__main__":
    with Store.open(sys.argv[1]) as store:
        for number in itertools.count():
            record(store, folder(f"turn{sys.argv[2]}/{number}", f"{sys.argv[2]} {number}"))
            study = take(store)
            store.commit(outcome(study, done(result=new_result())))
            sys.stdout.write(f"{number}\n")
            sys.stdout.flush()
