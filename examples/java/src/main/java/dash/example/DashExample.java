package dash.example;

import static java.util.concurrent.TimeUnit.MINUTES;
import static java.util.concurrent.TimeUnit.SECONDS;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import dash_api.v1.Common.ChatMessage;
import dash_api.v1.Common.ChatPrompt;
import dash_api.v1.Generation.GenerateRequest;
import dash_api.v1.Generation.GenerationFinished;
import dash_api.v1.Generation.GenerationParameters;
import dash_api.v1.Generation.StreamGenerateRequest;
import dash_api.v1.Generation.StreamGenerateResponse;
import dash_api.v1.Generation.Usage;
import dash_api.v1.GenerationServiceGrpc;
import dash_api.v1.GenerationServiceGrpc.GenerationServiceBlockingStub;
import io.grpc.Context;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import io.grpc.health.v1.HealthCheckRequest;
import io.grpc.health.v1.HealthGrpc;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.MetadataUtils;
import java.util.Iterator;

/**
 * Calls a dash-llm server: health, a streamed answer, a cancelled stream, and a request that is refused.
 *
 * <p>{@code DASH_TOKEN=… mvn -q compile exec:java -Dexec.args=host:port}
 */
public final class DashExample {
  public static void main(String[] args) throws Exception {
    String target = args.length > 0 ? args[0] : "localhost:50051";
    // Plaintext, for a server on this machine. For others: TlsChannelCredentials.create().
    ManagedChannel channel = Grpc.newChannelBuilder(target, InsecureChannelCredentials.create()).build();
    int exitCode = 0;
    try {
      run(channel, System.getenv("DASH_TOKEN"));
    } catch (StatusRuntimeException error) {
      printError(error);
      exitCode = 1;
    } finally {
      channel.shutdownNow().awaitTermination(5, SECONDS);
    }
    System.exit(exitCode);
  }

  private static void run(ManagedChannel channel, String token) throws InvalidProtocolBufferException {
    var health = HealthGrpc.newBlockingStub(channel).withDeadlineAfter(2, MINUTES);
    System.out.println("health: " + health.check(HealthCheckRequest.getDefaultInstance()).getStatus());

    var stub = GenerationServiceGrpc.newBlockingStub(channel).withDeadlineAfter(2, MINUTES);
    if (token != null && !token.isEmpty()) {
      var headers = new Metadata();
      headers.put(Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER), "Bearer " + token);
      stub = stub.withInterceptors(MetadataUtils.newAttachHeadersInterceptor(headers));
    }
    streamAnswer(stub);
    cancelStream(stub);
    sendBadRequest(stub);
  }

  /** Prints an answer as it comes, then the reason for its end and its speed. */
  private static void streamAnswer(GenerationServiceBlockingStub stub) {
    var parameters = chat("Why is the sky blue?", 64);
    var request = StreamGenerateRequest.newBuilder().setParameters(parameters).build();
    Iterator<StreamGenerateResponse> stream = stub.streamGenerate(request);
    while (stream.hasNext()) {
      StreamGenerateResponse response = stream.next();
      if (response.hasDelta()) {
        System.out.print(response.getDelta().getText());
        System.out.flush();
      } else if (response.hasFinished()) {
        GenerationFinished finished = response.getFinished();
        Usage usage = finished.getUsage();
        // decode_seconds begins with the first token.
        double speed = (usage.getOutputTokenCount() - 1) / usage.getDecodeSeconds();
        System.out.printf("%nfinished: %s, %.1f tokens a second%n", finished.getReason(), speed);
      }
    }
  }

  /** Cancels a long answer after its first text. The server stops within one step. */
  private static void cancelStream(GenerationServiceBlockingStub stub) {
    var parameters = chat("Tell me a long story.", 1000);
    parameters.getStoppingBuilder().setIgnoreEos(true);
    var request = StreamGenerateRequest.newBuilder().setParameters(parameters).build();
    try (Context.CancellableContext context = Context.current().withCancellation()) {
      context.run(
          () -> {
            Iterator<StreamGenerateResponse> stream = stub.streamGenerate(request);
            try {
              while (stream.hasNext()) {
                if (stream.next().hasDelta()) {
                  context.cancel(null);
                }
              }
            } catch (StatusRuntimeException error) {
              if (!context.isCancelled()) {
                throw error;
              }
              System.out.println("cancelled stream: " + error.getStatus().getCode());
            }
          });
    }
  }

  /** Prints what the server says to a temperature that does not exist. */
  private static void sendBadRequest(GenerationServiceBlockingStub stub) throws InvalidProtocolBufferException {
    var parameters = chat("Hello", 8);
    parameters.getSamplingBuilder().setTemperature(-1);
    try {
      stub.generate(GenerateRequest.newBuilder().setParameters(parameters).build());
      throw new IllegalStateException("the server took a temperature of -1");
    } catch (StatusRuntimeException error) {
      printError(error);
    }
  }

  private static GenerationParameters.Builder chat(String question, int maxNewTokens) {
    var message = ChatMessage.newBuilder().setRole("user").setContent(question);
    var parameters = GenerationParameters.newBuilder().setChat(ChatPrompt.newBuilder().addMessages(message));
    parameters.getStoppingBuilder().setMaxNewTokens(maxNewTokens);
    return parameters;
  }

  /** Prints a status with its google.rpc details: the reason, the wrong fields, the delay before a retry. */
  private static void printError(StatusRuntimeException error) throws InvalidProtocolBufferException {
    System.out.printf("%s: %s%n", error.getStatus().getCode(), error.getStatus().getDescription());
    for (Any detail : StatusProto.fromThrowable(error).getDetailsList()) {
      if (detail.is(ErrorInfo.class)) {
        System.out.println("  reason: " + detail.unpack(ErrorInfo.class).getReason());
      } else if (detail.is(BadRequest.class)) {
        for (var violation : detail.unpack(BadRequest.class).getFieldViolationsList()) {
          System.out.printf("  field: %s: %s%n", violation.getField(), violation.getDescription());
        }
      } else if (detail.is(RetryInfo.class)) {
        var delay = detail.unpack(RetryInfo.class).getRetryDelay();
        System.out.printf("  retry after: %.3f s%n", delay.getSeconds() + delay.getNanos() / 1e9);
      }
    }
  }
}
