"""The whole list, in the order of the table in docs/testing.md."""

from __future__ import annotations

from tests.mutations.fault import Fault
from tests.mutations.of_audio import AUDIO
from tests.mutations.of_boundary import BOUNDARY
from tests.mutations.of_checkpoints import CHECKPOINTS
from tests.mutations.of_compare import COMPARE
from tests.mutations.of_copies import COPIES
from tests.mutations.of_corpora import CORPORA
from tests.mutations.of_counts import COUNTS
from tests.mutations.of_encoders import ENCODERS
from tests.mutations.of_families import FAMILIES
from tests.mutations.of_faults import FAULTY
from tests.mutations.of_feeding import FEEDING
from tests.mutations.of_folders import FOLDERS
from tests.mutations.of_handover import HANDOVER
from tests.mutations.of_jobs import JOB
from tests.mutations.of_layouts import LAYOUTS
from tests.mutations.of_media import MEDIA
from tests.mutations.of_models import LLM
from tests.mutations.of_numerics import NUMERICS
from tests.mutations.of_order import ORDER
from tests.mutations.of_parallel import PARALLEL
from tests.mutations.of_planning import PLANNING
from tests.mutations.of_prices import PRICES
from tests.mutations.of_qwen import QWEN
from tests.mutations.of_remote import REMOTE
from tests.mutations.of_resolution import RESOLUTION
from tests.mutations.of_schedules import SCHEDULES
from tests.mutations.of_search import SEARCH
from tests.mutations.of_starting import STARTING
from tests.mutations.of_statistics import STATISTICS
from tests.mutations.of_text import TEXT

FAULTS: tuple[Fault, ...] = (
    *(PARALLEL + BOUNDARY + SCHEDULES + ENCODERS + AUDIO + RESOLUTION + MEDIA + LLM + FAMILIES),
    *(QWEN + JOB + TEXT + FOLDERS + STATISTICS + CORPORA + HANDOVER + LAYOUTS + FEEDING),
    *(ORDER + REMOTE + PLANNING + PRICES + COMPARE + SEARCH + COUNTS),
    *(STARTING + NUMERICS + FAULTY + CHECKPOINTS + COPIES),
)
