"""Sends traces to where --otlp-endpoint says, by OpenTelemetry's exporter."""

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from serve.contract.errors import SettingsError
from serve.contract.extras import how_to_install
from serve.service.telemetry import SERVICE_NAME
from serve.settings import ServeSettings

_FLUSH_TIMEOUT_MS = 5_000


def check_tracing(settings: ServeSettings) -> None:
    """Raise SettingsError if the settings want traces and the exporter is not installed."""
    if settings.otlp_endpoint:
        _exporter_to(settings.otlp_endpoint)


def configure_tracing(settings: ServeSettings) -> None:
    """Send this process's spans to `otlp_endpoint`, if it is set.

    Raises:
        SettingsError: an address is set but the exporter is not installed.
    """
    if not settings.otlp_endpoint:
        return
    # The rest is OpenTelemetry's own: OTEL_TRACES_SAMPLER, OTEL_RESOURCE_ATTRIBUTES and so on.
    provider = TracerProvider(resource=Resource.create({"service.name": SERVICE_NAME}))
    provider.add_span_processor(BatchSpanProcessor(_exporter_to(settings.otlp_endpoint)))
    trace.set_tracer_provider(provider)


def _exporter_to(endpoint: str) -> SpanExporter:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        raise SettingsError(
            "otlp_endpoint is set, but the exporter of traces is not installed: "
            f"{how_to_install('tracing')}, or set no address."
        ) from error
    return OTLPSpanExporter(endpoint=endpoint)


def flush_traces() -> None:
    """Send the spans of this process that have not been sent yet."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.force_flush(_FLUSH_TIMEOUT_MS)
