"""The beginning of a run: the model, its larger vocabulary and new layers, the tokenizer and the text."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from babel_jax.config import Config, ModelConfig
from babel_jax.data.tokens.chat_format import open_chat_format
from babel_jax.data.tokens.tokenizer import Tokenizer
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.data.windows.prepare import prepare
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.distributed.agreement import agreed, first_says
from babel_jax.errors import BadInput
from babel_jax.evaluation.points import point_file, score_model, write_point
from babel_jax.expansion.apply import expanding
from babel_jax.expansion.folders import expand_config, new_layers_of
from babel_jax.expansion.plan import ExpansionPlan, plan_from_settings
from babel_jax.model.decoder import initializing
from babel_jax.model_folders.folder import ModelFolder, open_folder
from babel_jax.model_folders.params import load_params
from babel_jax.model_folders.tokenizer_files import is_padding
from babel_jax.places import place
from babel_jax.progress import working
from babel_jax.recipe.vocabulary import larger_model
from babel_jax.report.record import PARENT_SAMPLES
from babel_jax.report.samples import write_samples
from babel_jax.training.deepening import Depth, depths
from babel_jax.training.mesh import make_mesh, param_shardings
from babel_jax.vocabulary.card import new_rows_of
from babel_jax.vocabulary.growth import grow_config, growing
from babel_jax.vocabulary.larger import LargerModel


@dataclasses.dataclass(frozen=True)
class Beginning:
    """The beginning of a run.

    - folder: the model folder, None for a model from random weights; its shape is `base_config`
    - larger: the model's larger vocabulary, None without [vocabulary]
    - plan: the expansion before the first step, None without
    - files: the folder with the tokenizer's files
    """

    config: Config
    folder: ModelFolder | None
    larger: LargerModel | None
    plan: ExpansionPlan | None
    base_config: ModelConfig
    base_tokenizer: Tokenizer
    tokenizer: Tokenizer
    files: Path | None

    @property
    def larger_config(self) -> ModelConfig:
        """The shape with the larger vocabulary, before new layers."""
        return self.base_config if self.larger is None else grow_config(self.base_config, self.larger.growth)

    @property
    def exported_like(self) -> ModelFolder | None:
        """The folder whose config the export follows."""
        if self.folder is None or self.larger is None:
            return self.folder
        return dataclasses.replace(self.folder, hf_config=self.larger.hf_config)

    @cached_property
    def models(self) -> Sequence[Depth]:
        """The model at each depth of the run; see `depths`."""
        first = self.larger_config if self.plan is None else expand_config(self.larger_config, self.plan)
        like = self.exported_like
        hf_config = {} if like is None else like.hf_config
        # The new layers, for stages that train them alone: of this expansion, or of the folder's last one.
        if self.plan is not None:
            new_layers = self.plan.new_layers
        else:
            new_layers = () if self.folder is None else new_layers_of(self.folder.hf_config)
        return depths(first, new_layers, self.config.deepen, new_rows_of(hf_config))

    def make_params(self) -> PyTree[Array]:
        """The parameters before the first step; evaluates the points `base`, `extended` and `expanded`."""
        config, mesh = self.config, make_mesh(self.config.training.mesh)
        # The model as it is before anything is added, in the point `base`.
        shardings = param_shardings(self.base_config, mesh)
        if self.folder is None:
            params = initializing(shardings)(self.base_config, jax.random.key(config.seed))
        else:
            params = load_params(self.folder, dtype=jnp.float32, shardings=shardings)
            evaluate_point(config, "base", self.base_config, params, self.base_tokenizer)
            write_samples(
                place(config.out),
                self.base_config,
                params,
                self.base_tokenizer,
                open_prepared(config.data.folder),
                mesh,
                jnp.dtype(config.training.compute_dtype),
                PARENT_SAMPLES,
            )
        # First the new rows, then the new layers. The model is evaluated after each.
        if self.larger is not None:
            with working("adding the rows of new tokens"):
                larger = growing(param_shardings(self.larger_config, mesh))
                params = larger(params, *self.larger.growth.arguments)
            evaluate_point(config, "extended", self.larger_config, params, self.tokenizer)
        if self.plan is not None:
            deeper = self.models[0].config
            with working("adding the layers"):
                params = expanding(param_shardings(deeper, mesh))(params, self.plan)
            if self.folder is not None:
                evaluate_point(config, "expanded", deeper, params, self.tokenizer)
        return params


def beginning_of(config: Config) -> Beginning:
    """Opens the model folder and prepares the text, if that is not done.

    Raises BadInput, in all processes, where a part is missing or was made with other settings.
    """
    # In this order: the folder, its larger vocabulary, the text (windows need that tokenizer), and the plan.
    with agreed():
        folder = open_folder(config.model.folder) if config.model.folder is not None else None
    larger = larger_model(config, folder)
    files = larger.path if larger is not None else folder.path if folder is not None else None
    with agreed():
        if config.data.sources and jax.process_index() == 0:
            # Returns at once if the data is prepared; raises if it was prepared with other settings.
            prepare(config.data, files)
    with agreed():
        tokenizer = base_tokenizer = _tokenizer(config, files)
        if larger is not None and folder is not None:
            base_tokenizer = open_tokenizer(folder.path, config.data.add_bos_token)
        base_config = folder.config if folder is not None else config.model.shape
        assert base_config is not None
        plan = None
        if config.expansion is not None:
            plan = plan_from_settings(config.expansion, base_config.num_hidden_layers)
    return Beginning(config, folder, larger, plan, base_config, base_tokenizer, tokenizer, files)


def _tokenizer(config: Config, files: Path | None) -> Tokenizer:
    path = config.data.tokenizer or files
    if path is None:
        raise BadInput("data.tokenizer is not set and there is no model folder to take one from")
    return open_tokenizer(path, config.data.add_bos_token)


def check_fit(config: Config, model_config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises BadInput if model, tokenizer and data do not fit each other; this can be checked only when all
    are there.
    """
    prepared = open_prepared(config.data.folder)
    prepared.check_tokenizer(tokenizer, config.data.conversations)
    # Windows of conversations fit one chat template alone, and windows of text fit none.
    chat = open_chat_format(tokenizer.path, config.data.chat_template) if config.data.conversations else None
    if prepared.chat_template != (chat.fingerprint if chat is not None else None):
        if chat and prepared.chat_template:
            other = f"with another chat template than {chat.location}"
        else:
            other = "as the other of text and conversations"
        raise BadInput(
            f"{config.data.folder}: prepared {other}; prepare another folder, or set data.conversations as "
            "it was then"
        )

    # A padding token may have no row (WizardLM): no text has it, and windows are padded with the token that
    # ends a document.
    rows = model_config.vocab_size
    beyond = {token.id: token.content for token in tokenizer.added_tokens if token.id >= rows}
    is_only_padding = len(beyond) == tokenizer.vocab_size - rows and all(map(is_padding, beyond.values()))
    if tokenizer.vocab_size > rows and not is_only_padding:
        raise BadInput(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size:,} entries, and the model's "
            f"embedding {rows:,} rows (vocab_size); set data.tokenizer to the model's own"
        )
    if config.data.seq_len > model_config.max_position_embeddings:
        raise BadInput(
            f"data.seq_len = {config.data.seq_len} exceeds the model's max_position_embeddings = "
            f"{model_config.max_position_embeddings}"
        )


def evaluate_point(
    config: Config, point: str, model_config: ModelConfig, params: PyTree[Array], tokenizer: Tokenizer
) -> None:
    """Evaluates on the held-out text and writes the point's file; an existing file is kept."""
    if first_says(point_file(place(config.out), point).is_file()):
        return
    measured = score_model(config, point, model_config, params, tokenizer)
    with agreed():
        if jax.process_index() == 0:
            write_point(place(config.out), point, measured)
