"""Taking the sound of a source file over into an mp4 file, as it is where mp4 allows and as AAC elsewhere."""

from collections.abc import Generator, Iterator
from fractions import Fraction
from pathlib import Path

from litevae.errors import extra

with extra("video"):
    import av
    import av.error
    from av.audio.frame import AudioFrame
    from av.audio.resampler import AudioResampler
    from av.audio.stream import AudioStream
    from av.container import InputContainer, OutputContainer
    from av.packet import Packet

_COPIED_CODECS = frozenset({"aac", "mp3", "mp3float", "ac3", "eac3", "alac"})
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
_AAC_LAYOUTS = frozenset({"mono", "stereo", "3.0", "4.0", "5.0", "5.1"})
_BITS_PER_CHANNEL = 96_000
_LARGEST_DRIFT = Fraction(1, 20)  # seconds; below it, uneven timestamps are rounding in the source


class AudioTracks:
    """The audio streams of one file on their way into another; packets are read as the video advances.

    Args:
        source: the file that the sound comes from.
        output: the mp4 container, whose header is not written yet; the streams are added to it here.
        origin: seconds of the source's clock that become zero.

    Attributes:
        notes: what could not be kept, in words.
    """

    def __init__(self, source: str | Path, output: OutputContainer, origin: Fraction) -> None:
        self.notes: list[str] = []
        self._container: InputContainer = av.open(
            f"file:{source}", metadata_errors="ignore", options={"protocol_whitelist": "file"}
        )
        tracks: list[_Copied | _Encoded] = []
        for stream in self._container.streams.audio:
            # PyAV gives no codec context where FFmpeg has no decoder.
            if stream.codec_context is None or not stream.rate:
                self.notes.append(f"audio stream {stream.index} is of an unknown codec and left out")
            elif stream.codec_context.name in _COPIED_CODECS:
                tracks.append(_Copied(stream, output, origin))
            else:
                tracks.append(_Encoded(stream, output, origin))
        self._packets = self._read({track.source.index: track for track in tracks})
        self._pending: tuple[float, list[Packet]] | None = next(self._packets, None)

    def packets_until(self, time: float) -> Iterator[Packet]:
        """Yield what the source plays before ``time``, in seconds of its clock, and was not yielded before."""
        while self._pending is not None and self._pending[0] < time:
            yield from self._pending[1]
            self._pending = next(self._packets, None)

    def close(self) -> None:
        """Close the source."""
        self._packets.close()
        self._container.close()

    def _read(self, tracks: dict[int, "_Copied | _Encoded"]) -> Generator[tuple[float, list[Packet]], None, None]:
        """Yield (seconds of the source's clock, packets for the output) in the order of the file."""
        if not tracks:
            return
        time = 0.0
        try:
            for packet in self._container.demux([track.source for track in tracks.values()]):
                track = tracks[packet.stream.index]
                stamp = packet.dts if packet.dts is not None else packet.pts
                if stamp is not None and packet.time_base:
                    time = float(stamp * packet.time_base)
                yield time, track.take(packet)
        except av.error.FFmpegError as error:
            self.notes.append(f"the audio ends at {time:.3f} s, where it cannot be read: {error.strerror}")
        for track in tracks.values():
            yield time, track.finish()


class _Copied:
    """A stream whose packets go over as they are."""

    def __init__(self, source: AudioStream, output: OutputContainer, origin: Fraction) -> None:
        self.source = source
        self._stream = output.add_stream_from_template(source)
        self._origin = origin
        self._last_dts: int | None = None

    def take(self, packet: Packet) -> list[Packet]:
        """Move a packet to the output's stream and clock; an empty one, which ends a stream, is dropped."""
        if packet.size == 0 or packet.dts is None or packet.time_base is None:
            return []
        shift = round(self._origin / packet.time_base)
        packet.dts -= shift
        packet.pts = packet.dts if packet.pts is None else packet.pts - shift
        if self._last_dts is not None and packet.dts <= self._last_dts:
            packet.dts = self._last_dts + 1
            packet.pts = max(packet.pts, packet.dts)
        self._last_dts = packet.dts
        packet.stream = self._stream
        return [packet]

    def finish(self) -> list[Packet]:
        """Return nothing, because nothing is held back."""
        return []


class _Encoded:
    """A stream that mp4 players do not know, decoded and encoded again as AAC."""

    def __init__(self, source: AudioStream, output: OutputContainer, origin: Fraction) -> None:
        self.source = source
        rate = next((rate for rate in _AAC_RATES if rate >= source.rate), _AAC_RATES[-1])
        layout = source.layout.name if source.layout.name in _AAC_LAYOUTS else "stereo"
        self._stream = output.add_stream(
            "aac", rate=rate, layout=layout, bit_rate=_BITS_PER_CHANNEL * len(av.AudioLayout(layout).channels)
        )
        self._resampler = AudioResampler(format="fltp", layout=layout, rate=rate)
        self._rate = rate
        self._origin = origin
        self._next_sample: int | None = None

    def take(self, packet: Packet) -> list[Packet]:
        """Decode a packet and encode what it held; a damaged packet leaves a gap."""
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            return []
        return [encoded for frame in frames for encoded in self._encode(frame)]

    def finish(self) -> list[Packet]:
        """Encode what the resampler and the encoder held back."""
        if self._next_sample is None:
            return []
        return [*self._encode(None), *self._stream.encode(None)]

    def _encode(self, frame: AudioFrame | None) -> list[Packet]:
        """Encode a decoded frame on a gapless clock that follows the source's.

        Containers with a clock of milliseconds give timestamps that do not add up to whole samples; the AAC
        encoder needs ones that do. Only a real gap or jump moves the clock.
        """
        if frame is not None and frame.pts is not None and frame.time_base:
            sample = round((frame.pts * frame.time_base - self._origin) * self._rate)
            drift = None if self._next_sample is None else Fraction(sample - self._next_sample, self._rate)
            if drift is None or drift > _LARGEST_DRIFT:
                self._next_sample = sample
        packets = []
        for piece in self._resampler.resample(frame):
            self._next_sample = self._next_sample or 0
            piece.pts = self._next_sample
            piece.time_base = Fraction(1, self._rate)
            self._next_sample += piece.samples
            packets += self._stream.encode(piece)
        return packets
