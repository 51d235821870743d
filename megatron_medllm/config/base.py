"""What every section of the configuration shares: frozen, strict about unknown keys."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the run's configuration. Unknown keys are refused; values never change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())
