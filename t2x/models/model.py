"""From a model's config to the model."""

from flax import nnx

from t2x.models import decoder
from t2x.models import encoder
from t2x.models import encoder_decoder

ModelConfig = (
  decoder.DecoderConfig
  | encoder.EncoderConfig
  | encoder_decoder.EncoderDecoderConfig
)
Transformer = decoder.Decoder | encoder.Encoder | encoder_decoder.EncoderDecoder

_CLASSES = {
  decoder.DecoderConfig: decoder.Decoder,
  encoder.EncoderConfig: encoder.Encoder,
  encoder_decoder.EncoderDecoderConfig: encoder_decoder.EncoderDecoder,
}


def make(config: ModelConfig, *, rngs: nnx.Rngs) -> Transformer:
  """Builds the model that a config describes.

  Args:
    config: the settings of an encoder, a decoder or an encoder-decoder.
    rngs: keys of the initial weights.
  """
  return _CLASSES[type(config)](config, rngs=rngs)
