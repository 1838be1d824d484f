"""The names of the files of a model, which are the same in a folder and in a repository on the hub."""

CONFIG = "config.json"
PARAMS = "params"  # the folder of Orbax
SAFETENSORS = ".safetensors"
INDEX = "model.safetensors.index.json"
# Weights of other programs. This program reads none of them.
OTHER_WEIGHTS = (
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".ckpt",
    ".onnx",
    ".onnx_data",
    ".npz",
    ".ot",
    ".tflite",
)
# Weights of any framework and their indexes. No other file of a model is large, and the others are still
# valid for a model with changed weights.
WEIGHT_SUFFIXES = (SAFETENSORS, *OTHER_WEIGHTS, ".index.json")
TOKENIZER_JSON, SENTENCEPIECE_MODEL = "tokenizer.json", "tokenizer.model"
MOST_TOKENIZER_BYTES = 48 * 2**20  # of one of these two that is read: Gemma 3's tokenizer.json has 33 MB
MOST_BESIDE_BYTES = 2**27  # of any other file
FOLDERS_BESIDE = ("additional_chat_templates",)
