"""A real OpenID provider (`oidc-provider` on Node), and logins against it."""
