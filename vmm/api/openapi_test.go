package api_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/govmm/govmm/vmm/api"
)

var update = flag.Bool("update", false, "write docs/openapi.json")

// The document in docs is the one that every VM serves. It is made from the handlers.
func TestOpenAPI(t *testing.T) {
	document := func(path string) []byte {
		w := httptest.NewRecorder()
		api.NewServer[*fakeMigration](&fakeVM{}, "/run/x.sock").Handler().ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		if w.Code != 200 || w.Header().Get("Content-Type") != "application/openapi+json" {
			t.Fatalf("%s: %d %s", path, w.Code, w.Body)
		}
		var out bytes.Buffer
		if err := json.Indent(&out, w.Body.Bytes(), "", " "); err != nil {
			t.Fatal(err)
		}
		return out.Bytes()
	}
	const file = "../../docs/openapi.json"
	served := document("/v1/openapi.json")
	if *update {
		if err := os.WriteFile(file, served, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if kept, err := os.ReadFile(file); err != nil || !bytes.Equal(kept, served) {
		t.Errorf("docs/openapi.json is not what is served (%v): go test ./vmm/api -run TestOpenAPI -update", err)
	}
	for path, version := range map[string]string{"/v1/openapi.json": "3.1.0", "/v1/openapi-3.0.json": "3.0.3"} {
		var doc struct {
			OpenAPI string
			Paths   map[string]map[string]struct{ OperationID, Summary string }
		}
		text := document(path)
		if err := json.Unmarshal(text, &doc); err != nil || doc.OpenAPI != version {
			t.Errorf("%s is OpenAPI %q, %v", path, doc.OpenAPI, err)
		}
		ids := map[string]bool{}
		for route, methods := range doc.Paths {
			for method, op := range methods {
				if op.OperationID == "" || op.Summary == "" || ids[op.OperationID] {
					t.Errorf("%s %s: %+v", method, route, op)
				}
				ids[op.OperationID] = true
			}
		}
		if len(ids) < 13 {
			t.Errorf("%d operations", len(ids))
		}
		if strings.Contains(string(text), "https://") {
			t.Error("it points outside")
		}
	}
}
