package api

import "net/http"

// Handler is what answers the server's requests.
func (s *Server) Handler() http.Handler { return s.http.Handler }
