"""Does a model have a backdoor, and which class is its target? Answered from clean images, without the trigger."""

from ibau_jax.auditing.auditor import Audit, Auditor, SpaceFindings, audit
from ibau_jax.auditing.judgement import Suspect, Verdict, lingering

__all__ = ["Audit", "Auditor", "SpaceFindings", "Suspect", "Verdict", "audit", "lingering"]
