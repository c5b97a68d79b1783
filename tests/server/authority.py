"""A certificate authority of the tests' own."""

from pathlib import Path

import grpc
import trustme


class Authority:
    """Issues certificates into files."""

    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA()
        self.certificate, self.key = folder / "server.pem", folder / "server.key"
        self.ca_file = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.ca_file)
        self.renew()

    def renew(self) -> trustme.LeafCert:
        """Writes a new certificate and its key, one after the other."""
        issued = self.ca.issue_cert("localhost")
        issued.private_key_pem.write_to_path(self.key)
        self.certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        return issued

    def settings(self) -> dict[str, object]:
        """Returns a server's settings for them."""
        return {"tls_certificate_file": self.certificate, "tls_key_file": self.key}

    def credentials(self, client: str | None = None, issuer: trustme.CA | None = None) -> grpc.ChannelCredentials:
        """Returns a client's credentials: they trust this authority, and have its certificate for the name `client`."""
        roots = self.ca.cert_pem.bytes()
        if client is None:
            return grpc.ssl_channel_credentials(roots)
        issued = (issuer or self.ca).issue_cert(common_name=client)
        chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
        return grpc.ssl_channel_credentials(roots, issued.private_key_pem.bytes(), chain)
