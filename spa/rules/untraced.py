"""Operators of the standard that no channel can be traced through, each with the reason that users read.

They are barriers: whatever reaches them freezes.
"""

from spa.rules import unsupported

_ELEMENTS = "its result depends on the values and places of all elements"
_RANDOM = "it draws random numbers in the order of all elements, so removing some changes the others"
_STRINGS = "it works on strings, which carry no channels"
_CLASSICAL = "a classical learner's tables carry no channels of a network"
_TRAINING = "it trains, and a trained network is what is pruned"
_NEWER = "it belongs to an operator set that onnxruntime does not run yet"

unsupported("EyeLike", "its diagonal ties rows to columns")
unsupported("NonMaxSuppression", "it picks boxes by comparing all of them")
unsupported("NonZero", _ELEMENTS)
unsupported("Unique", _ELEMENTS)

for key in ["Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"]:
    unsupported(key, _RANDOM)

for key in ["ImageDecoder", "RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer"]:
    unsupported(key, _STRINGS)

for key in ["CausalConvWithState", "LinearAttention", "SwiGLU", "ai.onnx.preview::FlexAttention"]:
    unsupported(key, _NEWER)

for key in ["Adagrad", "Adam", "Gradient", "Momentum"]:
    unsupported(f"ai.onnx.preview.training::{key}", _TRAINING)

for key in [
    *["ArrayFeatureExtractor", "Binarizer", "CastMap", "CategoryMapper", "DictVectorizer", "FeatureVectorizer"],
    *["Imputer", "LabelEncoder", "LinearClassifier", "LinearRegressor", "Normalizer", "OneHotEncoder"],
    *["SVMClassifier", "SVMRegressor", "Scaler", "TreeEnsemble", "TreeEnsembleClassifier"],
    *["TreeEnsembleRegressor", "ZipMap"],
]:
    unsupported(f"ai.onnx.ml::{key}", _CLASSICAL)
