"""The web application and its process: routes, streaming, authorization, limits on connections, metrics."""
